"""How good a model is, in figures that stand beside what they would be by chance and at best.

From outside: `evaluation.Evaluation` measures all of them, `model.EvaluatedModel` is what it measures, `report` says
them to people. `figures` takes arrays and can be used by itself.
"""
