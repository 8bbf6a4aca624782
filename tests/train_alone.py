"""One SAE trained in a pass of its own, on batches that are at hand."""

from collections.abc import Iterator

from saexp.saes.training import Record, Training
from saexp.saes.training_pass import Reader, ReaderBatches, train_together


def train_alone(training: Training, reader: Reader) -> Iterator[Record]:
    """Train from the last checkpoint to the end; yields a record every `log_every` steps."""
    training.resume()
    batches = ReaderBatches({training.streams: reader})
    for _, record in train_together([training], batches):
        yield record
