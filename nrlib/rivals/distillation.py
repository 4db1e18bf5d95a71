"""Distillation from the backbone: Li and Hoiem, Learning without Forgetting, https://arxiv.org/abs/1606.09282, with the
old text's proxy in place of the new text.

Fine-tune every weight; on original-domain tokens add `kl_weight` times the divergence from the backbone's predictions.
The penalty is `nrlib.penalties.kl_penalty`, which neutral residues can use as well.
"""

from ..methods import fine_tuning as build  # noqa: F401
