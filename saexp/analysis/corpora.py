"""What an analyzer of corpora is given, in place of latents in memory."""

from abc import abstractmethod
from dataclasses import dataclass

from saexp.analysis.base import Analyzer
from saexp.latents.encode import Latents
from saexp.latents.streaming import StreamedLatents
from saexp.results import Result


@dataclass(frozen=True, kw_only=True)
class CorpusInputs:
    """Latents at the ordinary positions of a corpus, and neutral text for comparison."""

    latents: StreamedLatents
    layer: int
    background: Latents | None = None
    """Latents at random positions of neutral text."""


class CorpusAnalyzer(Analyzer):
    """Base class of analyzers that take `dataset=corpus` too."""

    @abstractmethod
    def analyze_corpus(self, inputs: CorpusInputs) -> Result:
        """As `analyze`, in passes over the latents; memory does not grow with the tokens."""
