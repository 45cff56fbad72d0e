"""Caches of keys and values for transformers' ``generate()`` which free the bytes that they save.

``prepare`` a model once, and pass one of these as its cache:

* `HeadSpanCache`: each head holds its newest tokens and the first ones, as many as it needs;
* `QuantizedCache`: 8 or 4 bits a number;
* `EvictingCache`: the tokens of a prompt that its end looks at;
* `HostCache`: everything, on the host; exact.

transformers is imported here, and nowhere else in memopt.
"""

from memopt.cache.attention import prepare
from memopt.cache.columns import FullStore
from memopt.cache.evicting import EvictingCache, KeptStore, pyramid
from memopt.cache.host import HostCache, HostStore, Stage
from memopt.cache.layer import HeadCache, HeadLayer
from memopt.cache.quantized import QuantizationError, QuantizedCache, QuantizedStore
from memopt.cache.spans import HeadSpanCache, WindowStore

__all__ = [
    "EvictingCache",
    "FullStore",
    "HeadCache",
    "HeadLayer",
    "HeadSpanCache",
    "HostCache",
    "HostStore",
    "KeptStore",
    "QuantizationError",
    "QuantizedCache",
    "QuantizedStore",
    "Stage",
    "WindowStore",
    "prepare",
    "pyramid",
]
