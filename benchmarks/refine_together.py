"""Refine several plans of one checkpoint in one pass, which hands its moments to all of them.

For an example the pass takes three times as long as the refinement of one file. The files are those
of `dots1 convert --refine`, byte for byte.
"""

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGUFWriter
from threadpoolctl import threadpool_limits

from dots1_local.calibrate.layer_moments import ExpertMoments
from dots1_local.calibrate.manifest import IMATRIX
from dots1_local.calibrate.moments import Moment
from dots1_local.calibrate.refinement_file import RefinementData
from dots1_local.calibrate.refining_pass import RefiningPass
from dots1_local.calibrate.stream_files import StreamFiles
from dots1_local.convert import Conversion
from dots1_local.convert.metadata import write_metadata
from dots1_local.convert.output import Output, lay_out
from dots1_local.convert.pipeline import Pipeline
from dots1_local.convert.refined import RefinedTensors
from dots1_local.convert.refined_writer import TensorWriter
from dots1_local.convert.writer import Journal
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.hub.pass_shards import forward_steps
from dots1_local.progress import silent
from dots1_local.quant.imatrix_file import load_importance
from dots1_local.quant.plan import QuantPlan
from dots1_local.reference.model import Compute
from dots1_local.refine.arrays import arrays_on

__all__ = ["refine_together"]


def refine_together(
    checkpoint: Path, calibration: Path, files: Mapping[Path, QuantPlan], work: Path
) -> dict[Path, int]:
    """Write the refined `files` on one core, and return their bytes; `work` is deleted."""
    source = Checkpoint.open(checkpoint)
    data = RefinementData.load(calibration, source)
    shape = (*data.tokens.shape, source.config.hidden_size)
    with ExitStack() as opened:
        journals = [  # which also lock the files and `work`
            opened.enter_context(Journal(_laid_out(source, calibration, *file), ""))
            for file in files.items()
        ]
        opened.callback(shutil.rmtree, work, ignore_errors=True)
        stream = opened.enter_context(StreamFiles(work, "together", shape, 0))
        opened.enter_context(threadpool_limits(1, user_api="blas"))
        sinks = [
            opened.enter_context(_sink(source, calibration, data, each, work)) for each in journals
        ]
        compute = Compute(torch.device("cpu"), bf16=False)
        streamed = RefiningPass(source, data.tokens, compute, 1, stream, lambda what: None)
        streamed.run(_Together(sinks), forward_steps(source.config.num_hidden_layers))
        for journal in journals:
            journal.publish()
    return {journal.output.path: journal.output.total_bytes for journal in journals}


def _laid_out(source: Checkpoint, calibration: Path, path: Path, plan: QuantPlan) -> Output:
    conversion = Conversion.prepare(source, plan, calibration=calibration, refine=True)
    writer = GGUFWriter(None, "dots1")
    tokens = conversion.refinement.tokens.size if conversion.refinement else 0
    known = conversion.importance, conversion.predicted_kl, tokens
    write_metadata(writer, source, plan, *known)
    conversion.tokenizer.write(writer)
    return lay_out(path, writer, conversion.tensors, None)


def _sink(
    source: Checkpoint, calibration: Path, data: RefinementData, journal: Journal, work: Path
) -> RefinedTensors:
    importance = load_importance(calibration / IMATRIX)
    writer = TensorWriter(journal, work / f"{journal.output.path.stem}.jsonl", silent)

    def convert_plainly(names: Collection[str]) -> None:
        Pipeline(source, journal, importance, 1).run(names=names)

    slots, arrays = journal.output.slots, arrays_on(None)
    return RefinedTensors(source, slots, data, importance, writer, convert_plainly, 1, arrays)


@dataclass(frozen=True)
class _Together:
    """Hands all moments on to several sinks."""

    sinks: Sequence[RefinedTensors]

    def embedding(self) -> None:
        for sink in self.sinks:
            sink.embedding()

    def begin(self, layer: int | None) -> bool:
        wanted = [sink.begin(layer) for sink in self.sinks]  # each of them begins
        return any(wanted)

    def common(self, moments: Mapping[str, Moment]) -> None:
        for sink in self.sinks:
            sink.common(moments)

    def expert(self, number: int, moments: ExpertMoments) -> None:
        for sink in self.sinks:
            sink.expert(number, moments)

    def finish(self, layer: int | None) -> None:
        for sink in self.sinks:
            sink.finish(layer)
