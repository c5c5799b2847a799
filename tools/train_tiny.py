"""Train dots1-tiny: a small dots.llm1, first on books and stories, then on chat about the stories.

    python -m tools.train_tiny --english BOOK... --chinese BOOK... --stories FILE \
        --work build/tiny -o examples/dots1-tiny

The end of every file is held out. State is saved to `--work` every few minutes, and the same
command continues from there. Speed comes from bf16; on a CPU without it the run is four times
as long. `--workers` is the number of processes that share a batch, one thread each.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from tokenizers import Tokenizer
from torch import Tensor

from dots1_local.architecture import Dots1Config
from tools import tiny_export, tiny_text
from tools.tiny_model import Model, Team, count_experts, new_model, shared_rows, step

__all__ = ["GEOMETRY", "Plan", "main", "train"]

GEOMETRY = Dots1Config(
    hidden_size=256, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=4,
    head_dim=64, intermediate_size=704, moe_intermediate_size=192, n_routed_experts=24,
    n_shared_experts=2, num_experts_per_tok=4, first_k_dense_replace=1,
    routed_scaling_factor=2.5, norm_topk_prob=True, vocab_size=4096, rms_norm_eps=1e-5,
    rope_theta=1e7, max_position_embeddings=2048,
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a run does; with the files and the geometry it fixes the result."""

    tokens: int = 3950
    length: int = 512
    batch: int = 8
    epochs: float = 4.0
    chat_epochs: float = 2.0
    rate: float = 3e-3
    chat_rate: float = 1e-3
    bias_rate: float = 2e-3
    warmup: int = 100
    heldout_share: float = 0.04
    evaluate_every: int = 250
    seed: int = 1


@dataclass(frozen=True)
class Data:
    """Text as tokens: what to train on, and each kind's held-out rows."""

    corpus: tiny_text.Corpus
    tokenizer: Tokenizer
    plain: tiny_text.Tokens
    stories: tiny_text.Tokens

    @classmethod
    def read(cls, files: dict[str, list[Path]], plan: Plan, work: Path) -> "Data":
        corpus = tiny_text.read_corpus(files, plan.heldout_share)
        saved = work / "tokenizer.json"
        if not saved.exists():
            tiny_text.train_tokenizer(corpus, plan.tokens).save(str(saved))
        tokenizer = Tokenizer.from_file(str(saved))
        everything = [text for texts in corpus.train.values() for text in texts]
        return cls(
            corpus,
            tokenizer,
            tiny_text.encode(tokenizer, everything),
            tiny_text.encode(tokenizer, corpus.train["stories"]),
        )

    def batches(self, plan: Plan, chat: bool) -> Iterator[Tensor]:
        """[batch, length + 1], epoch after epoch."""
        for epoch in count():
            seed = plan.seed + epoch
            if chat:
                stories = self.corpus.train["stories"]
                rows = tiny_text.chat_rows(
                    self.tokenizer, stories, self.plain, plan.length, 1000 + seed
                )
            else:
                rows = tiny_text.windows(self.plain, plan.length, seed)
            for start in range(0, len(rows) - plan.batch + 1, plan.batch):
                yield torch.from_numpy(rows[start : start + plan.batch])

    def steps(self, plan: Plan) -> tuple[int, int]:
        """How many steps plain text gets, and chat."""
        stories = self.corpus.train["stories"]
        chat = tiny_text.chat_rows(self.tokenizer, stories, self.plain, plan.length, 1)
        plain = (len(self.plain) - 1) // plan.length
        return (
            int(plan.epochs * (plain // plan.batch)),
            int(plan.chat_epochs * (len(chat) // plan.batch)),
        )


def learning_rate(plan: Plan, at: int, plain: int, chat: int) -> float:
    """Warm-up, constant, then down over the last third of each phase: to a third, and to zero.

    Constant for long, so that a run may be lengthened or cut short while it is under way.
    """
    if at < plain:
        left = (plain - at) / max(1, plain // 3)
        floor = plan.chat_rate
        return min(plan.rate * min(1.0, (at + 1) / plan.warmup),
                   floor + (plan.rate - floor) * min(1.0, left))  # fmt: skip
    return plan.chat_rate * min(1.0, (plain + chat - at) / max(1, chat * 2 // 3))


def new_optimizer(model: Model) -> torch.optim.AdamW:
    """AdamW; norms and embeddings are not decayed."""
    matrices = [t for n, t in model.tensors.items() if t.requires_grad and _decays(n)]
    others = [t for n, t in model.tensors.items() if t.requires_grad and not _decays(n)]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def _decays(name: str) -> bool:
    return "norm" not in name and "embed_tokens" not in name


@torch.no_grad()
def heldout_losses(
    model: Model, data: Data, plan: Plan, every: int = 1
) -> tuple[dict[str, float], Tensor]:
    """Nats per token of each kind's held-out text, and the experts' [layers, experts] counts.

    Looks at `every` n-th row only, where that will do.
    """
    config = model.config
    counts = torch.zeros(config.num_hidden_layers, config.n_routed_experts)
    losses = {}
    for kind, text in data.corpus.heldout.items():
        tokens = tiny_text.encode(data.tokenizer, [text])
        length = min(plan.length, len(tokens) - 1)
        parts = torch.from_numpy(tiny_text.in_order(tokens, length)[::every]).split(plan.batch)
        sums = [model.loss(part, count_experts(config, counts)) * len(part) for part in parts]
        losses[kind] = float(torch.stack(sums).sum() / sum(len(part) for part in parts))
    return losses, counts


@dataclass
class State:
    """What a killed run needs to go on as if nothing had happened."""

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
    def load_or_start(cls, path: Path, config: Dots1Config, seed: int) -> "State":
        model = new_model(config, seed)
        state = cls(model, new_optimizer(model), 0, [])
        if path.exists():
            saved = torch.load(path, weights_only=True)
            with torch.no_grad():
                for name, tensor in model.tensors.items():
                    tensor.copy_(saved["model"][name])
            state.optimizer.load_state_dict(saved["optimizer"])
            state.at, state.curve = saved["at"], saved["curve"]
        return state


def train(
    data: Data,
    config: Dots1Config,
    plan: Plan,
    state_file: Path,
    team: Team,
    save_seconds: float = 120.0,
    stop_at: int | None = None,
) -> State:
    """Train to the end of the plan, or to step `stop_at`, from `state_file` where there is one."""
    state = State.load_or_start(state_file, config, plan.seed)
    plain, chat = data.steps(plan)
    end = plain + chat if stop_at is None else stop_at
    saved = time.monotonic()
    for phase_start, phase_end, is_chat in ((0, plain, False), (plain, plain + chat, True)):
        if not phase_start <= state.at < min(phase_end, end):
            continue
        batches = islice(
            data.batches(plan, is_chat), state.at - phase_start, phase_end - phase_start
        )
        for rows in batches:
            if state.at >= end:
                break
            rate = learning_rate(plan, state.at, plain, chat)
            for group in state.optimizer.param_groups:
                group["lr"] = rate
            bias_rate = plan.bias_rate * rate / plan.rate
            began = time.monotonic()
            loss, _ = step(state.model, state.optimizer, rows, bias_rate, team)
            state.at += 1
            if team.rank == 0:
                took = time.monotonic() - began
                _report(state, data, plan, loss, rate, took, state.at in (plain, plain + chat))
                if time.monotonic() - saved > save_seconds:
                    state.save(state_file)
                    saved = time.monotonic()
    if team.rank == 0:
        state.save(state_file)
    return state


def _report(
    state: State, data: Data, plan: Plan, loss: float, rate: float, took: float, last: bool
) -> None:
    if state.at % 10 == 0:
        print(f"step {state.at} loss {loss:.4f} rate {rate:.2e} {took:.2f} s", flush=True)
    if state.at % plan.evaluate_every == 0 or last:
        losses, counts = heldout_losses(state.model, data, plan, every=4)
        load = tiny_export.relative_load(state.model.config, counts)
        tokens = state.at * plan.batch * plan.length
        state.curve.append({"step": state.at, "tokens": tokens, "loss": loss, "heldout": losses})
        print(f"step {state.at} held out {losses} least load {load.min():.2f}", flush=True)


def _work(rank: int, arguments: argparse.Namespace, rows: Tensor, barrier: Any) -> None:
    torch.set_num_threads(1)
    plan, files = _plan(arguments), {kind: getattr(arguments, kind) for kind in tiny_text.KINDS}
    data = Data.read(files, plan, arguments.work)
    team = Team(arguments.workers, rank, rows, barrier if arguments.workers > 1 else None)
    state = train(
        data, GEOMETRY, plan, arguments.work / "state.pt", team, stop_at=arguments.stop_at
    )
    if rank == 0:
        losses, counts = heldout_losses(state.model, data, plan)
        tiny_export.export(arguments.output, state.model, data.tokenizer, data.corpus,
                           asdict(plan), state.curve, losses, counts)  # fmt: skip


def _plan(arguments: argparse.Namespace) -> Plan:
    return Plan(epochs=arguments.epochs, chat_epochs=arguments.chat_epochs)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for kind in tiny_text.KINDS:
        parser.add_argument(f"--{kind}", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder of the saved state")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=Plan.epochs)
    parser.add_argument("--chat-epochs", type=float, default=Plan.chat_epochs)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--stop-at", type=int, help="stop and export after this step")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = {kind: getattr(arguments, kind) for kind in tiny_text.KINDS}
    Data.read(files, _plan(arguments), arguments.work)  # leaves the tokenizer for the workers
    rows = shared_rows(GEOMETRY, arguments.workers)
    barrier = mp.get_context("spawn").Barrier(arguments.workers)
    mp.spawn(_work, (arguments, rows, barrier), nprocs=arguments.workers)


if __name__ == "__main__":
    main()
