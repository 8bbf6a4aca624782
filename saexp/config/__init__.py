"""What a run can be asked: a dataclass per component, validated when it is built."""

from saexp.config.components import (
    AnalyzerConfig,
    CapabilityConfig,
    CollectorConfig,
    ImportedConfig,
    ModelConfig,
    PositionsConfig,
    ProbeConfig,
    SAEConfig,
    StatsConfig,
    StoreConfig,
    TopFeaturesConfig,
    TrackerConfig,
)
from saexp.config.datasets import CorpusConfig, DatasetConfig, WikidataConfig
from saexp.config.environment import (
    parse_coefficients,
    parse_layers,
    parse_width,
    parse_widths,
)
from saexp.config.interventions import InterventionConfig
from saexp.config.run import RunConfig, register_schema, to_run_config
from saexp.config.tasks import (
    CacheConfig,
    CollectConfig,
    DashboardConfig,
    EvaluateConfig,
    LabelConfig,
    SAETrainerConfig,
    TaskConfig,
    TrainConfig,
)

__all__ = [
    "CorpusConfig",
    "AnalyzerConfig",
    "CollectorConfig",
    "CacheConfig",
    "CapabilityConfig",
    "CollectConfig",
    "DashboardConfig",
    "DatasetConfig",
    "EvaluateConfig",
    "ImportedConfig",
    "InterventionConfig",
    "LabelConfig",
    "ModelConfig",
    "PositionsConfig",
    "ProbeConfig",
    "RunConfig",
    "SAEConfig",
    "SAETrainerConfig",
    "StatsConfig",
    "StoreConfig",
    "TaskConfig",
    "TopFeaturesConfig",
    "TrackerConfig",
    "TrainConfig",
    "WikidataConfig",
    "parse_coefficients",
    "parse_layers",
    "parse_width",
    "parse_widths",
    "register_schema",
    "to_run_config",
]
