"""Log-likelihoods beside those of lm-evaluation-harness, on a small OPT with random weights and real text.

    python -m venv --system-site-packages .lm-eval && .lm-eval/bin/pip install lm-eval==0.4.13
    .lm-eval/bin/python benchmarks/evaluation/against_lm_eval.py

Prints one JSON line. Ends with 1 where a sum differs by more than 1e-4 nats or a greedy flag differs.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import OPTConfig, OPTForCausalLM
from trireme_trainer.data.prepare import Options, prepare
from trireme_trainer.evaluation import source
from trireme_trainer.evaluation.prompts import encode
from trireme_trainer.evaluation.scoring import score
from trireme_trainer.parallel.world import World

TEXT = Path(__file__).resolve().parents[2] / "LICENSE"
POSITIONS = 64
LARGEST = 1e-4


def make_model(directory: Path) -> OPTForCausalLM:
    options = Options(vocabulary=384, separator="blank-line", valid_fraction=0.2)
    prepare([str(TEXT)], str(directory / "corpus"), options)
    shape = OPTConfig(
        vocab_size=384, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
        max_position_embeddings=POSITIONS, dropout=0.0, attention_dropout=0.0, init_std=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OPTForCausalLM(shape).eval()
    model.save_pretrained(directory / "hf")
    (directory / "hf" / "tokenizer.json").write_text((directory / "corpus" / "tokenizer.json").read_text())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "pad_token": "<pad>"}
    (directory / "hf" / "tokenizer_config.json").write_text(json.dumps(settings))
    return model


def likeliest(lm: HFLM, context: str) -> str:
    """The one token that the model would say, as text."""
    ids = torch.tensor([lm.tok_encode(context)])
    with torch.no_grad():
        token = lm.model(ids).logits[0, -1].argmax().item()
    text: str = lm.tokenizer.decode([token])
    return text


def make_pairs(lm: HFLM) -> list[tuple[str, str]]:
    lines = [line.strip() for line in TEXT.read_text().splitlines() if len(line.split()) > 6]
    pairs = []
    for number, line in enumerate(lines[:120]):
        words = line.split()
        context, end = " ".join(words[:-2]), " ".join(words[-2:])
        pairs.append((f"{context} ", end) if number % 3 == 0 else (context, f" {end}"))
    pairs += [("", " ".join(line.split()[:3])) for line in lines[:10]]
    pairs += [(line, said) for line in lines[:20] if (said := likeliest(lm, line)).strip()]
    return [*pairs, (" ".join(lines[:20]), " the end")]


def main() -> int:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        make_model(directory)
        lm = HFLM(pretrained=str(directory / "hf"), device="cpu", batch_size=4, dtype="float32")
        pairs = make_pairs(lm)
        theirs = lm.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
        loaded = source.load(str(directory / "hf"), None, None, torch.float32, torch.device("cpu"))
        assert loaded.encoder is not None
        requests, cut = encode(pairs, loaded.encoder, POSITIONS, document_start=False)
        ours = score(loaded.model, requests, World(0, 1, 0, 1, torch.device("cpu")), sequences=8)
    largest = max(abs(mine.log_likelihood - other[0]) for mine, other in zip(ours, theirs, strict=True))
    flags = sum(mine.greedy != other[1] for mine, other in zip(ours, theirs, strict=True))
    print(json.dumps({
        "requests": len(pairs), "cut": cut, "greedy": sum(bool(other[1]) for other in theirs), "greedyDiffer": flags,
        "largestDifference": largest, "lowestSum": min(other[0] for other in theirs),
    }))  # fmt: skip
    return int(largest > LARGEST or flags > 0)


if __name__ == "__main__":
    sys.exit(main())
