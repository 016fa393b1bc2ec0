"""The tiny model beside transformers' Llama with the same weights."""

import jax
import numpy as np
import pytest

from helpers.training import MODEL
from helpers.variants import init
from stellarbyte_jax.model.decoder import ByteTransformer


def llama_pair():
    """Our model, its weights and transformers' model with the same ones, laid out here by hand."""
    torch = pytest.importorskip("torch", reason="the peer of this test")
    import transformers

    torch.set_num_threads(1)  # threads cost more than such a model

    model = ByteTransformer(MODEL)
    params = jax.device_get(init(model))
    c = MODEL
    peer = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.mlp_size,
            num_hidden_layers=c.num_hidden_layers,
            num_attention_heads=c.num_attention_heads,
            num_key_value_heads=c.kv_heads,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.rms_norm_eps,
            attn_implementation="eager",
        )
    )
    layers = params["layers"]["0"]
    weights = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["lm_head"]["kernel"].T,
    }
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        for name in "qkv":
            weights[f"{at}self_attn.{name}_proj.weight"] = layers["attn"][name][i].reshape(c.hidden_size, -1).T
        weights[f"{at}self_attn.o_proj.weight"] = layers["attn"]["o"][i].reshape(-1, c.hidden_size).T
        weights[f"{at}mlp.gate_proj.weight"] = layers["mlp"]["gate_up"][i, :, 0].T
        weights[f"{at}mlp.up_proj.weight"] = layers["mlp"]["gate_up"][i, :, 1].T
        weights[f"{at}mlp.down_proj.weight"] = layers["mlp"]["down"][i].T
        weights[f"{at}input_layernorm.weight"] = layers["attn_norm"]["scale"][i]
        weights[f"{at}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    peer.load_state_dict({name: torch.from_numpy(np.array(w)) for name, w in weights.items()})
    return model, params, peer
