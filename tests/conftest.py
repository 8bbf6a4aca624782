"""Settings of all tests: no network, one thread per process, seeded examples of hypothesis."""

import gc
import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Inherited by the commands that tests start: with several processes, more threads make torch
# many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

LONG = (
    "faults/test_signals",
    "faults/test_wandb_outages",
    "test_search",
    "test_train_processes",
    "test_interventions",
    "test_experiments",
    "real_models/test_gemma",
    "test_sweep",
    "test_train_stream",
    "test_readme",
    "test_wandb_sweep",
    "faults/test_full_disks",
    "test_run",
    "test_dry_run",
    "faults/test_campaign",
    "test_causal_property",
    "test_train",
    "test_contrast_error_rates",
    "test_describe",
    "faults/test_shared_rows",
    "test_report_again",
    "test_shared",
    "faults/test_finished_runs",
    "test_reuse_by_content",
    "test_label",
    "simulations/test_no_false_discoveries",
    "simulations/test_probe_numbers",
    "test_inactive_latents",
    "test_scores_cache",
    "test_sae_check",
    "test_train_together",
    "test_secrets",
    "simulations/test_rates",
    "test_run_folders",
    "test_layers_run",
    "test_sweep_cells",
    "test_bad_input",
    "real_models/test_smollm2",
    "test_train_transcoders",
    "test_truncation",
    "test_rank_tests",
    "test_reuse",
    "test_evaluate",
    "faults/test_read_only_cache",
    "test_values_in_runs",
    "test_controls_run",
    "faults/test_checkpoints",
    "test_notes",
)
"""Files that take longest, started first so that no worker waits for the last of them."""


def pytest_configure(config: pytest.Config) -> None:
    """Nothing in the process that hands the tests to workers: imports would keep them waiting."""
    if config.getoption("numprocesses", None):
        return
    import torch
    from hypothesis import settings

    from tests import cheap_composition, unsynced

    # Workers, and other jobs, share the cores; so deadlines mean nothing here.
    torch.set_num_threads(1)
    settings.register_profile("saexp", deadline=None, derandomize=True, database=None)
    settings.load_profile("saexp")
    cheap_composition.install()
    unsynced.install()
    # Until the tests are imported, which makes objects that stay.
    gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; the order within a file stays."""
    rank = {f"tests/e2e/{name}.py": n for n, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish() -> None:
    """Leave the imported modules out of garbage collections: a full one would take 0.2 s."""
    gc.freeze()
    # As in a command: configs and tables make many small objects.
    gc.set_threshold(50_000, 20, 50)
    gc.enable()


@pytest.fixture(autouse=True)
def remove_log_handlers() -> Iterator[None]:
    """Remove what a command that ran in this process added for its log and the console.

    The console's would go on writing to what was captured of its test, and that is closed.
    """
    yield
    root = logging.getLogger()
    for handler in root.handlers[:]:
        is_log = isinstance(handler, logging.FileHandler)
        if (is_log and handler.baseFilename.endswith("saexp.log")) or (
            type(handler) is logging.StreamHandler
        ):
            root.removeHandler(handler)
            handler.close()
