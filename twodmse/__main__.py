"""The console command: `twodmse COMMAND ...` is `python run_scripts/COMMAND.py ...`."""

import difflib
import importlib
import sys

from twodmse import __version__

COMMANDS = {
    "elasticize": "make your encoder elastic on your corpus, without labels",
    "finetune": "train an elastic encoder; without arguments, the quickstart",
    "pretrain": "pre-train every size on plain text (SMAE)",
    "evaluate": "score every size on STS and retrieval sets",
    "encode": "embed a corpus at one or several sizes",
    "build_index": "build a search index in stages",
    "search": "search an index",
    "demo": "search and compare at any size in a web page; without arguments, on Python's documentation",
    "plan": "choose sizes and stages for a budget",
    "mine_negatives": "find hard negatives with the model itself",
    "export": "write one size as a plain model or ONNX",
    "push_to_hub": "upload a model with its card",
    "compare": "compare methods under one budget",
    "benchmark": "measure speed and memory",
    "classify": "train and evaluate nested classifiers (MRL)",
    "train_m3": "train a LLaVA at several numbers of visual tokens (M3)",
    "evaluate_m3": "evaluate it at each of them",
    "pretrain_franca": "train nested clustering of images (Franca)",
    "evaluate_franca": "evaluate it at each nesting size",
}


def main() -> None:
    """Run the script that the first argument names with the rest of the arguments."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        lines = [f"  {command:<16} {what}" for command, what in COMMANDS.items()]
        print("\n".join(["usage: twodmse COMMAND [--help] [--flag value ...]", "", *lines]))
        return
    if name in ("-V", "--version"):
        print(f"twodmse {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, ["--help", "--version", *COMMANDS], n=1)
        near = near or [command for command in COMMANDS if name in command.split("_")]
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(COMMANDS)}"
        print(f"twodmse: error: {name} is unknown; {hint}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [f"twodmse {name}", *sys.argv[2:]]
    importlib.import_module(f"run_scripts.{name}").main()


if __name__ == "__main__":
    main()
