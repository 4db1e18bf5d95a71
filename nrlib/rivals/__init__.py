"""Other ways to extend a model, for comparison. One file a method, named like the method; each has

    build(backbone, config) -> the model to train,

and, where the method needs them, `make_penalty` (a term of the training loss) and `finish` (what follows training).
"""
