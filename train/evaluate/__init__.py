"""How good a model is, in figures that stand beside what they would be by chance and at best.

`evaluation.Evaluation` puts them together. Each of the others takes arrays and can be used by itself.
"""
