"""A trained model by transformers' Auto classes: generated from, trained on, saved, and loaded again.

    python train.py fit --config configs/runs/tiny.yaml --trainer.max_steps 500
    python examples/transformers_classes.py runs/tiny/model --prompt "def load(path):"

Importing `engram.interop.causal_lm` is all that transformers needs to know the model. Whatever takes a
`PreTrainedModel` takes it then.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

import engram.interop.causal_lm  # noqa: F401  registers the model
from engram.training.optim import OptimConfig, build_optimizer, clip_gradients


def main(folder: Path, prompt: str, n: int, steps: int, out: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(**inputs, max_new_tokens=n, do_sample=False, streamer=TextStreamer(tokenizer))

    # A loop of one's own. Memory tables have row-sparse gradients: the optimiser is one that takes them. (With the
    # Trainer: `engram.interop.trainer.MemoryTrainer`.)
    optimizer = build_optimizer(model.lm, OptimConfig(lr=2e-4, matrix_optimizer="adamw"))
    text = Path(__file__).read_text(encoding="utf-8")
    batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=512)
    model.train()
    for step in range(steps):
        loss = model(**batch, labels=batch.input_ids).loss
        loss.backward()
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_balance()
        print(f"step {step + 1}: {loss.item():.3f} nats on this file")

    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    print(f"saved in {out}, and loaded with the same logits")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a model's folder with its tokenizer, as a run leaves it")
    parser.add_argument("--prompt", default="def load(path):")
    parser.add_argument("-n", type=int, default=40, help="new tokens")
    parser.add_argument("--steps", type=int, default=10, help="of training on this very file")
    parser.add_argument("--out", type=Path, default=Path("runs/transformers_classes"))
    main(**vars(parser.parse_args()))
