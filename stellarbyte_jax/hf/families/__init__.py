"""One table a family: where its weights lie and what its settings are called."""

from stellarbyte_jax.hf.families.llama import LLAMA
from stellarbyte_jax.hf.families.mistral import MISTRAL
from stellarbyte_jax.hf.families.mixtral import MIXTRAL
from stellarbyte_jax.hf.families.phi3 import PHI3
from stellarbyte_jax.hf.families.qwen2 import QWEN2
from stellarbyte_jax.hf.families.qwen3 import QWEN3
from stellarbyte_jax.hf.families.qwen3_moe import QWEN3_MOE
from stellarbyte_jax.hf.families.stellarbyte import STELLARBYTE

# The most widely read one first; our own, which expresses most, last.
FAMILIES = {
    family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, MIXTRAL, QWEN3_MOE, STELLARBYTE)
}
