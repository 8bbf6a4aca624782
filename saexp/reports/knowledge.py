"""Whether the groups of a run are what its model knows, in sentences."""

from saexp.data.datasets import SHIPPED_MODELS
from saexp.reports.saved_run import SavedRun

KNOWN, UNKNOWN = "known", "unknown"
_BY_ANSWERS = (
    "The command task=label labels names by the model's own answers, and prints the dataset.path= "
    "to use then"
)


def presumed_knowledge(run: SavedRun) -> str | None:
    """A warning where the model's unsteered answers contradict the labels known and unknown.

    That is where it answers fewer than half of the questions on known entities correctly, or at
    least half of those on unknown ones.
    """
    if not _presumes(run):
        return None
    known, unknown = (run.metrics.get(f"baseline/accuracy_{g}") for g in (KNOWN, UNKNOWN))
    if (known is None or known >= 0.5) and (unknown is None or unknown < 0.5):
        return None
    return (
        "Warning: the labels 'known' and 'unknown' are the data set's, not this model's own "
        f"knowledge. {_answers(run)} {_BY_ANSWERS}."
    )


def knowledge_sentences(run: SavedRun) -> list[str]:
    """How many questions the model answers correctly without intervention, per group.

    Where the run asked none, a sentence that the labels known and unknown were not compared with
    the model's answers; nothing if they come from its answers, or belong to a shipped model.
    """
    if presumed_knowledge(run) is not None:
        # It is among the findings.
        return []
    if any(k.startswith("baseline/n_questions_") for k in run.metrics):
        return [_answers(run)]
    is_shipped = run.config["model"]["name"] in SHIPPED_MODELS
    shipped = is_shipped and run.config["dataset"].get("path") is None
    if shipped or not _presumes(run):
        return []
    return [
        "The labels 'known' and 'unknown' are the data set's; this run did not compare them with "
        f"what the model answers. {_BY_ANSWERS}."
    ]


def _presumes(run: SavedRun) -> bool:
    """Whether the groups are known and unknown entities, not labelled by a model's answers."""
    if set(run.provenance["groups"] or ()) != {KNOWN, UNKNOWN}:
        return False
    rows = run.table("rows")
    # task=label writes this column.
    return rows is None or "n_known" not in rows


def _answers(run: SavedRun) -> str:
    """One sentence on the unsteered answers; an entity has one question."""
    asked, unasked = [], []
    for group in run.provenance["groups"]:
        n = run.metrics.get(f"baseline/n_questions_{group}")
        if n:
            n_correct = run.metrics[f"baseline/n_correct_{group}"]
            asked.append(f"{n_correct} of {n} questions on {group} prompts")
        elif n is not None:
            unasked.append(f"{group} prompts have no true answer in the data")
    without = f" ({'; '.join(unasked)})" if unasked else ""
    return f"Without intervention the model answers {' and '.join(asked)} correctly{without}."
