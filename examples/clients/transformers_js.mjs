// transformers.js: `node transformers_js.mjs FOLDER TEXT...` prints the vectors of an ONNX export, by AutoModel and by
// pipeline("feature-extraction"), as JSON. npm install @huggingface/transformers
import path from "node:path";
import { AutoModel, AutoTokenizer, env, pipeline } from "@huggingface/transformers";

const [folder, ...given] = process.argv.slice(2);
const texts = given.length ? given : ["a man plays the guitar", "someone is playing an instrument"];
const name = path.basename(path.resolve(folder));
env.localModelPath = path.dirname(path.resolve(folder));
env.allowRemoteModels = false;

const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModel.from_pretrained(name, { dtype: "fp32" });
const { sentence_embedding } = await model(await tokenizer(texts, { padding: true, truncation: true }));

const extract = await pipeline("feature-extraction", name, { dtype: "fp32" });
const pooled = await extract(texts, { pooling: "mean", normalize: true });
console.log(JSON.stringify({ AutoModel: sentence_embedding.tolist(), pipeline: pooled.tolist() }));
