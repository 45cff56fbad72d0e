"""The only module that imports transformers, which is optional: ``memopt.cache`` alone needs it.

Checked on transformers 5.24.
"""

from memopt._versions import TRANSFORMERS

TRANSFORMERS.check()

from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402

__all__ = ["AttentionInterface", "AttentionMaskInterface", "Cache", "CacheLayerMixin"]
