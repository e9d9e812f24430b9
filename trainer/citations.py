"""The papers behind the objectives, in BibTeX, for model cards."""

TWO_DMSE = """@article{li2024_2dmse,
  title = {2D Matryoshka Sentence Embeddings},
  author = {Li, Xianming and Li, Zongxi and Li, Jing and Xie, Haoran and Li, Qing},
  journal = {arXiv preprint arXiv:2402.14776},
  year = {2024}
}"""
ESPRESSO = """@article{li2024_espresso,
  title = {ESE: Espresso Sentence Embeddings},
  author = {Li, Xianming and Li, Zongxi and Li, Jing and Xie, Haoran and Li, Qing},
  journal = {arXiv preprint arXiv:2402.14776},
  note = {later title of 2D Matryoshka Sentence Embeddings},
  year = {2024}
}"""
STARBUCKS = """@article{zhuang2024_starbucks,
  title = {Starbucks: Improved Training for 2D Matryoshka Embeddings},
  author = {Zhuang, Shengyao and Wang, Shuai and Koopman, Bevan and Zuccon, Guido},
  journal = {arXiv preprint arXiv:2410.13230},
  year = {2024}
}"""
MATRYOSHKA = """@inproceedings{kusupati2022_matryoshka,
  title = {Matryoshka Representation Learning},
  author = {Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and Wallingford, Matthew and Sinha, Aditya and
            Ramanujan, Vivek and Howard-Snyder, William and Chen, Kaifeng and Kakade, Sham and Jain, Prateek and
            Farhadi, Ali},
  booktitle = {Advances in Neural Information Processing Systems},
  note = {arXiv:2205.13147},
  year = {2022}
}"""
# The source of each objective first, then what it builds on.
CITATIONS = {
    "2dmse": (TWO_DMSE, MATRYOSHKA),
    "starbucks": (STARBUCKS, TWO_DMSE, MATRYOSHKA),
    "matryoshka": (MATRYOSHKA,),
    "espresso": (ESPRESSO, MATRYOSHKA),
    "separate": (STARBUCKS, MATRYOSHKA),
}
