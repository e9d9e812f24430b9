"""semantic-router: `python with_semantic_router.py FOLDER` with a plain export, by both encoders that read a folder."""

import sys

from semantic_router import Route
from semantic_router.encoders import HuggingFaceEncoder, LocalEncoder
from semantic_router.routers import SemanticRouter
from shared import TEXTS, report

folder = sys.argv[1]
# HuggingFaceEncoder reads the backbone and pools by itself: it ignores 2_Dense, so that vectors have all dimensions.
for encoder in (HuggingFaceEncoder(name=folder), LocalEncoder(name=folder)):
    report(folder, encoder(TEXTS))
routes = [Route(name=text, utterances=[text], score_threshold=0.3) for text in TEXTS[:3]]
router = SemanticRouter(encoder=encoder, routes=routes, auto_sync="local")
print(all(router(text).name == text for text in TEXTS[:3]))
