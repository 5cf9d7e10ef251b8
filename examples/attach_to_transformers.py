"""Memory added to a transformers model that is there already, and trained alone.

    python examples/attach_to_transformers.py

A small Llama is first trained on this package's own source, saved, and loaded as any model is. Then memory is
attached to it and trained, with the Llama frozen, by the transformers Trainer; the loss is that of held-out text. The
memory is saved alone, taken off, loaded again, and the model writes.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainingArguments,
)

from engram import MemoryConfig
from engram.interop import attach, load_adapter
from engram.interop.trainer import MemoryTrainer
from engram.training.tokenizer import EOS, PAD, train_bpe

T, BATCH = 128, 8
MEMORY = MemoryConfig(n_heads=4, row_width=16, rows=(20_000, 20_000))


def texts() -> tuple[list[str], list[str]]:
    """Source and documentation of this package: files to train on, and about one in eight, by its name, to test on."""
    root = Path(__file__).resolve().parents[1]
    files = sorted([*root.glob("engram/**/*.py"), *root.glob("docs/*.md")])
    held_out = [hashlib.sha256(file.name.encode()).digest()[0] % 8 == 0 for file in files]
    split = [[f.read_text("utf-8") for f, out in zip(files, held_out, strict=True) if out == side] for side in (0, 1)]
    return split[0], split[1]


def windows(tokenizer: PreTrainedTokenizerFast, some: list[str]) -> Tensor:
    """Ids `[n, T]`."""
    ids = [i for text in some for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    return torch.tensor(ids).unfold(0, T, T)


def pretrain(model: LlamaForCausalLM, data: Tensor, steps: int) -> None:
    """A backbone from nothing, so that there is one to attach to without a network."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        batch = data[torch.randint(len(data), (BATCH,))]
        loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"backbone, step {step}: {loss.item():.3f} nats")


@torch.no_grad()
def loss_of(model: torch.nn.Module, data: Tensor) -> float:
    """Mean loss on windows, in nats."""
    model.eval()
    losses = [model(batch, labels=batch, use_cache=False).loss * len(batch) for batch in data.split(BATCH)]
    return float(sum(losses) / len(data))


def main(backbone_steps: int, steps: int, folder: Path) -> None:
    torch.manual_seed(0)
    train, test = texts()
    fast = train_bpe(train, 1024)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=PAD, eos_token=EOS)
    data, held_out = windows(tokenizer, train), windows(tokenizer, test)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    backbone = LlamaForCausalLM(config)
    pretrain(backbone, data, backbone_steps)
    for part in (backbone, tokenizer):
        part.save_pretrained(folder / "backbone")

    # From here on: any model of the hub.
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone")
    before = loss_of(model, held_out)
    attachment = attach(model, layers=(1, 2), memory=MEMORY)  # sizes and tokenizer are the model's own
    print(f"held-out loss {before:.4f} nats; {loss_of(model, held_out):.4f} with memory that has learnt nothing yet")
    settings = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    examples = [{"input_ids": window, "labels": window} for window in data]
    MemoryTrainer(model=model, args=settings, train_dataset=examples).train()
    after = loss_of(model, held_out)
    print(f"held-out loss {before:.4f} -> {after:.4f} nats, the backbone as it was")

    attachment.save(folder / "memory")
    attachment.remove()
    print(f"memory taken off: {loss_of(model, held_out):.4f}")
    load_adapter(model, folder / "memory")
    print(f"memory of {folder / 'memory'} attached: {loss_of(model, held_out):.4f}")
    prompts = AutoTokenizer.from_pretrained(folder / "backbone", padding_side="left")(
        ["from engram.config import", "def test_"], return_tensors="pt", padding=True
    )
    prompts.pop("token_type_ids", None)
    written = model.generate(**prompts, max_new_tokens=24, do_sample=False)
    for text in tokenizer.batch_decode(written, skip_special_tokens=True):
        print(f"| {text!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--folder", type=Path, default=Path("runs/attach"), help="where backbone and memory go")
    main(**vars(parser.parse_args()))
