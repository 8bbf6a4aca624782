"""`hydra/sweeper=saexp_optuna`: Hydra accepts plugins from the package `hydra_plugins` alone."""

from hydra.core.config_store import ConfigStore

from saexp.sweeps import search


class OptunaSweeper(search.OptunaSweeper):
    """The sweeper, under a name that Hydra accepts."""


ConfigStore.instance().store(
    group="hydra/sweeper", name="saexp_optuna", node=search.OptunaConfig, provider="saexp"
)
