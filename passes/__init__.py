"""The passes: one file each, in the order they run.

Import them as ``memopt.passes``. The folder is called ``passes`` only in the source tree.
"""

if __name__ != "memopt.passes":
    raise ImportError(f"import memopt.passes, not {__name__}: it would be loaded a second time")

from memopt.forms import Form
from memopt.passes.chunk_losses import ChunkLosses
from memopt.passes.clone_mutated_inputs import CloneMutatedInputs
from memopt.passes.compress import Compress
from memopt.passes.cut_maps import CutMaps
from memopt.passes.cut_rows import CutRows
from memopt.passes.early_backward import EarlyBackward
from memopt.passes.early_gradients import EarlyGradients
from memopt.passes.early_masks import EarlyMasks
from memopt.passes.early_products import EarlyProducts
from memopt.passes.embedding_gradients import EmbeddingGradients
from memopt.passes.forget_inputs import ForgetInputs
from memopt.passes.fuse_attention import FuseAttention
from memopt.passes.fuse_gates import FuseGates
from memopt.passes.fuse_norms import FuseNorms
from memopt.passes.fuse_rotary import FuseRotary
from memopt.passes.fuse_rows import FuseRows
from memopt.passes.narrow_integers import NarrowIntegers
from memopt.passes.narrow_products import NarrowProducts
from memopt.passes.offload import Offload, OffloadToFiles
from memopt.passes.overwrite_hidden_states import MarkHiddenStates, OverwriteHiddenStates
from memopt.passes.overwrite_rotary import OverwriteRotary
from memopt.passes.pack_masks import PackMasks
from memopt.passes.pack_query_groups import PackQueryGroups
from memopt.passes.prove_causal import ProveCausal
from memopt.passes.remake_in_backward import RemakeInBackward
from memopt.passes.sparse_attention import SparseAttention
from memopt.passes.tune_norms import TuneNorms
from memopt.passes.unshare_readers import UnshareReaders
from memopt.passes.weigh_rows import WeighRows
from memopt.pipeline import Pass

PRE_GRAD: tuple[Pass, ...] = (
    ChunkLosses(),
    WeighRows(),
    FuseRotary(),
    FuseNorms(),
    FuseGates(),
    FuseAttention(),
    ProveCausal(),
    SparseAttention(),
    PackQueryGroups(),
)
JOINT: tuple[Pass, ...] = (
    CloneMutatedInputs(),
    EmbeddingGradients(),
    MarkHiddenStates(),
    RemakeInBackward(),
    TuneNorms(),
    ForgetInputs(),
    NarrowProducts(),
    EarlyMasks(),
    EarlyGradients(),
    EarlyBackward(),
)
POST_GRAD: tuple[Pass, ...] = (
    UnshareReaders(),
    EarlyProducts(),
    OverwriteHiddenStates(),
    FuseRows(),
    OverwriteRotary(),
)
FORMS: tuple[Form, ...] = (PackMasks(), NarrowIntegers(), Compress(), Offload(), OffloadToFiles())
CUT_ROWS = CutRows()
CUT_MAPS = CutMaps()
