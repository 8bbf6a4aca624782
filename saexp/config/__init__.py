"""What a run can be asked: a dataclass per component, validated when it is built."""

from saexp.config.components import (
    AnalyzerConfig,
    CapabilityConfig,
    CollectorConfig,
    DatasetConfig,
    ImportedConfig,
    ModelConfig,
    PositionsConfig,
    ProbeConfig,
    SAEConfig,
    StatsConfig,
    StoreConfig,
    TopFeaturesConfig,
    TrackerConfig,
    WikidataConfig,
)
from saexp.config.corpora import CorpusConfig
from saexp.config.environment import parse_coefficients, parse_layers, parse_width
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
    "register_schema",
    "to_run_config",
]
