"""Train dots1-tiny: a small dots.llm1, first on books and stories, then on chat about the stories.

    python -m tools.train_tiny --english BOOK... --chinese BOOK... --stories FILE \\
        --work build/tiny -o examples/dots1-tiny

The end of every file is held out. The state is saved to `--work` every two minutes, and the same
command resumes from it. This takes about an hour on two cores with bf16, and four without it.
"""

import argparse
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dots1_local.architecture import Dots1Config
from tools import tiny_text
from tools.tiny_chat import chat_rows
from tools.tiny_export import export, relative_load
from tools.tiny_model import Model, Team, count_experts, new_model, shared_rows, step

__all__ = [
    "GEOMETRIES",
    "GEOMETRY",
    "Data",
    "Plan",
    "TrainingState",
    "heldout_losses",
    "main",
    "train",
]

GEOMETRY = Dots1Config(
    hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4,
    head_dim=64, intermediate_size=704, moe_intermediate_size=192, n_routed_experts=24,
    n_shared_experts=2, num_experts_per_tok=4, first_k_dense_replace=1,
    routed_scaling_factor=2.5, norm_topk_prob=True, vocab_size=4096, rms_norm_eps=1e-5,
    rope_theta=10_000_000, max_position_embeddings=2048,
)  # fmt: skip
GEOMETRIES = {
    "dots1-tiny": GEOMETRY,
    # Deeper, with fewer and wider experts; `make bench-quality` was not tuned on it.
    "dots1-deep": replace(
        GEOMETRY, num_hidden_layers=7, num_attention_heads=8, num_key_value_heads=8, head_dim=32,
        intermediate_size=640, moe_intermediate_size=224, n_routed_experts=12, n_shared_experts=1,
        num_experts_per_tok=3, vocab_size=3584,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """The settings of a run; with the files and the geometry they determine the result."""

    tokens: int = 3950
    length: int = 512
    batch: int = 8
    epochs: float = 4.0
    chat_epochs: float = 1.5
    rate: float = 3e-3
    chat_rate: float = 1e-3
    bias_rate: float = 2e-3
    warmup: int = 100
    heldout_share: float = 0.04
    evaluate_every: int = 250
    save_seconds: float = 120.0
    seed: int = 1


@dataclass(frozen=True)
class Data:
    """The text as tokens."""

    corpus: tiny_text.Corpus
    tokenizer: Tokenizer
    plain: tiny_text.Tokens

    @classmethod
    def read(cls, files: dict[str, list[Path]], plan: Plan, work: Path) -> "Data":
        """Read the files; train the tokenizer, unless `work` has one."""
        corpus = tiny_text.read_corpus(files, plan.heldout_share)
        saved = work / "tokenizer.json"
        if not saved.exists():
            tiny_text.train_tokenizer(corpus, plan.tokens).save(str(saved))
        tokenizer = Tokenizer.from_file(str(saved))
        everything = [text for texts in corpus.train.values() for text in texts]
        return cls(corpus, tokenizer, tiny_text.encode(tokenizer, everything))

    def steps(self, plan: Plan) -> tuple[int, int]:
        """The number of steps on plain text, and on chat."""
        plain = len(tiny_text.windows(self.plain, plan.length, plan.seed)) // plan.batch
        chat = len(self._chat(plan, plan.seed)) // plan.batch
        return int(plan.epochs * plain), int(plan.chat_epochs * chat)

    def batches(self, plan: Plan) -> Iterator[Tensor]:
        """The batch [batch, length + 1] of every step."""
        plain, chat = self.steps(plan)
        texts = (tiny_text.windows(self.plain, plan.length, plan.seed + n) for n in count())
        chats = (self._chat(plan, plan.seed + n) for n in count())
        return chain(
            islice(_in_batches(texts, plan.batch), plain),
            islice(_in_batches(chats, plan.batch), chat),
        )

    def _chat(self, plan: Plan, seed: int) -> tiny_text.Tokens:
        stories = self.corpus.train["stories"]
        return chat_rows(self.tokenizer, stories, self.plain, plan.length, 1000 + seed)


def _in_batches(epochs: Iterator[tiny_text.Tokens], size: int) -> Iterator[Tensor]:
    for rows in epochs:
        for start in range(0, len(rows) - size + 1, size):
            yield torch.from_numpy(rows[start : start + size])


def learning_rate(plan: Plan, at: int, plain: int, chat: int) -> float:
    """The rate warms up, stays constant, falls to the chat rate over the last third of the plain
    text, and then to zero.

    It stays constant for long, so that a run can be made longer or shorter while it runs.
    """
    if at < plain:
        falling = min(1.0, (plain - at) / max(1, plain // 3))
        rate = plan.chat_rate + (plan.rate - plan.chat_rate) * falling
        return min(rate, plan.rate * (at + 1) / plan.warmup)
    return plan.chat_rate * min(1.0, (plain + chat - at) / max(1, chat * 2 // 3))


@dataclass
class TrainingState:
    """Everything that a killed run needs to be resumed with the same result."""

    model: Model
    optimizer: torch.optim.AdamW
    at: int
    curve: list[dict[str, Any]]

    def save(self, path: Path) -> None:
        content = {
            "model": self.model.tensors,
            "optimizer": self.optimizer.state_dict(),
            "at": self.at,
            "curve": self.curve,
        }
        torch.save(content, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    @classmethod
    def load_or_start(
        cls, path: Path, config: Dots1Config, seed: int, device: str = "cpu"
    ) -> "TrainingState":
        model = new_model(config, seed, device)
        state = cls(model, _new_optimizer(model), 0, [])
        if path.exists():
            saved = torch.load(path, weights_only=True, map_location=device)
            with torch.no_grad():
                for name, tensor in model.tensors.items():
                    tensor.copy_(saved["model"][name])
            state.optimizer.load_state_dict(saved["optimizer"])
            state.at, state.curve = saved["at"], saved["curve"]
        return state


def _new_optimizer(model: Model) -> torch.optim.AdamW:
    """AdamW without weight decay for norms and the embedding."""
    decayed: list[Tensor] = []
    free: list[Tensor] = []
    for name, tensor in model.tensors.items():
        if tensor.requires_grad:
            (free if "norm" in name or "embed_tokens" in name else decayed).append(tensor)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def train(
    data: Data,
    config: Dots1Config,
    plan: Plan,
    state_file: Path,
    team: Team | None = None,
    stop_at: int | None = None,
    device: str = "cpu",
) -> TrainingState:
    """Train to the plan's end or to step `stop_at`, resuming from `state_file` if it exists."""
    team = team or Team()
    state = TrainingState.load_or_start(state_file, config, plan.seed, device)
    plain, chat = data.steps(plan)
    saved = time.monotonic()
    for rows in islice(data.batches(plan), state.at, stop_at):
        rate = learning_rate(plan, state.at, plain, chat)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        loss = step(state.model, state.optimizer, rows, plan.bias_rate * rate / plan.rate, team)
        state.at += 1
        if team.rank == 0:
            _report(state, data, plan, loss, last=state.at in (plain, plain + chat))
            if time.monotonic() - saved > plan.save_seconds:
                state.save(state_file)
                saved = time.monotonic()
    if team.rank == 0:
        state.save(state_file)
    return state


def _report(state: TrainingState, data: Data, plan: Plan, loss: float, last: bool) -> None:
    """Print a line every ten steps; every `evaluate_every` steps add a point to the curve."""
    if state.at % 10 == 0:
        print(f"{time.strftime('%H:%M:%S')} step {state.at} loss {loss:.4f}", flush=True)
    if state.at % plan.evaluate_every == 0 or last:
        losses, counts = heldout_losses(state.model, data, plan, every=4)
        least = relative_load(state.model.config, counts).min()
        tokens = state.at * plan.batch * plan.length
        state.curve.append({"step": state.at, "tokens": tokens, "loss": loss, "heldout": losses})
        print(f"step {state.at} held out {losses} least load {least:.2f}", flush=True)


@torch.no_grad()
def heldout_losses(
    model: Model, data: Data, plan: Plan, every: int = 1
) -> tuple[dict[str, float], Tensor]:
    """Nats per token of each kind's held-out text, and the experts' counts [layers, experts].

    Only one row of `every` rows is used, for an estimate.
    """
    counts = torch.zeros(model.config.num_hidden_layers, model.config.n_routed_experts)
    losses = {}
    for kind, text in data.corpus.heldout.items():
        tokens = tiny_text.encode(data.tokenizer, [text])
        length = min(plan.length, len(tokens) - 1)
        parts = torch.from_numpy(tiny_text.in_order(tokens, length)[::every]).split(plan.batch)
        sums = [model.loss(part, count_experts(counts)) * len(part) for part in parts]
        losses[kind] = float(torch.stack(sums).sum() / sum(len(part) for part in parts))
    return losses, counts


def _work(rank: int, options: argparse.Namespace, rows: Tensor, barrier: Any) -> None:
    if options.device == "cpu":
        torch.set_num_threads(1)
    plan, files = _plan(options), _files(options)
    data = Data.read(files, plan, options.work)
    team = Team(options.workers, rank, rows, barrier if options.workers > 1 else None)
    state_file = options.work / "state.pt"
    geometry = GEOMETRIES[options.geometry]
    state = train(data, geometry, plan, state_file, team, options.stop_at, options.device)
    if rank == 0:
        losses, counts = heldout_losses(state.model, data, plan)
        run = {
            "name": options.geometry,
            "files": {kind: [path.name for path in paths] for kind, paths in files.items()},
            "plan": asdict(plan),
            "curve": state.curve,
        }
        text = tiny_text.beginnings(files)
        export(options.output, state.model, data.tokenizer, data.corpus, run, losses, counts, text)


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        tokens=options.tokens,
        epochs=options.epochs,
        chat_epochs=options.chat_epochs,
        seed=options.seed,
    )


def _files(options: argparse.Namespace) -> dict[str, list[Path]]:
    return {kind: getattr(options, kind) for kind in tiny_text.KINDS}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train dots1-tiny.")
    for kind in tiny_text.KINDS:
        parser.add_argument(f"--{kind}", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the saved state")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="dots1-tiny")
    parser.add_argument("--tokens", type=int, default=Plan.tokens, help="size of the tokenizer")
    parser.add_argument("--seed", type=int, default=Plan.seed)
    parser.add_argument("--epochs", type=float, default=Plan.epochs)
    parser.add_argument("--chat-epochs", type=float, default=Plan.chat_epochs)
    parser.add_argument("--workers", type=int, help="processes [2; 1 on a GPU]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stop-at", type=int, help="stop and write the model after this step")
    options = parser.parse_args()
    options.workers = options.workers or (2 if options.device == "cpu" else 1)
    if Plan.batch % options.workers:
        parser.error(f"--workers must divide the batch of {Plan.batch}")
    return options


def main() -> None:
    """Train as the command line says."""
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    # The number of rows of an expert changes with every step, and oneDNN compiles a kernel for each
    # number: cache more kernels than by default. Keep freed memory, because every step needs it.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "3000")
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(32 << 20))
    os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(4 << 30))
    Data.read(
        _files(options), _plan(options), options.work
    )  # writes the tokenizer that all processes read
    barrier = torch.multiprocessing.get_context("spawn").Barrier(options.workers)
    rows = shared_rows(GEOMETRIES[options.geometry], options.workers)
    spawn(_work, (options, rows, barrier), nprocs=options.workers)


if __name__ == "__main__":
    main()
