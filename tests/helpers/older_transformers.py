"""Reads exports with whatever transformers is first on the path: ``python older_transformers.py FOLDER``.

For each directory of FOLDER, ``NAME.npz`` has tokens, our logits, two ragged prompts and what we continue them with.
Prints a line for each directory: its name and the largest difference of logits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    """Checks every directory; an AssertionError names what differs."""
    print(transformers.__version__)
    for directory in sorted(path for path in folder.iterdir() if path.is_dir()):
        ours = np.load(directory.with_suffix(".npz"))
        tokens = torch.from_numpy(ours["tokens"].astype(np.int64))
        for attention in ("sdpa", "eager"):
            model = AutoModelForCausalLM.from_pretrained(
                directory, trust_remote_code=True, attn_implementation=attention, torch_dtype=torch.float32
            ).eval()
            with torch.no_grad():
                difference = np.abs(model(tokens).logits.numpy() - ours["logits"]).max()
            assert difference < 1e-4, (directory, attention, difference)
        half = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, torch_dtype=torch.bfloat16)
        for name, tensor in half.state_dict().items():
            is_exact = ".router." in name or name.endswith("xpos_rate")
            assert tensor.dtype == (torch.float32 if is_exact else torch.bfloat16), (directory, name)
        prompts = torch.from_numpy(ours["prompts"].astype(np.int64))  # 0 is padding
        mask = (prompts > 0).long()
        # Mixtral's own class takes no static cache in releases before 4.53.
        static = [{"cache_implementation": "static"}] * getattr(model, "_supports_static_cache", True)
        for options in ({}, {"use_cache": False}, *static):
            found = model.generate(prompts, attention_mask=mask, max_new_tokens=20, do_sample=False, **options)
            assert found[:, prompts.shape[1] :].tolist() == ours["texts"].tolist(), (directory, options)
        model.train().gradient_checkpointing_enable()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        # An expert without tokens has none.
        assert all(weight.grad is not None for name, weight in model.named_parameters() if ".experts." not in name)
        print(f"{directory.name}: {difference:.1e}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
