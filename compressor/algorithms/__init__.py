"""The mathematics of compression: tensors in, tensors out.

Nothing here knows what a model, a file or a recipe is. Each module states its formula, its source
and its legend of letters at the top, and each solver is tested against a slow, obvious version of
itself.
"""
