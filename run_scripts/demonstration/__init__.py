"""The demo: searching a corpus at any size of a model, in a web page.

`engine.py`, `heat_map.py`, `views.py` and `page.py`, with `style.css` and `picker.js`, are copied into a Space, see
`space.py`. They import torch, numpy, gradio and each other only.
"""
