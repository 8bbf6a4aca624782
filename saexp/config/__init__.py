"""What a run can be asked: typed schemas for every config group, checked where they are made."""

from saexp.config.components import (
    AnalyzerConfig,
    CollectorConfig,
    DatasetConfig,
    ImportedConfig,
    ModelConfig,
    PositionsConfig,
    SAEConfig,
    StoreConfig,
    TaskConfig,
    TrackerConfig,
)
from saexp.config.environment import parse_coefficients, parse_layers, parse_width
from saexp.config.interventions import InterventionConfig
from saexp.config.run import RunConfig, register_schema, to_run_config

__all__ = [
    "AnalyzerConfig",
    "CollectorConfig",
    "DatasetConfig",
    "ImportedConfig",
    "InterventionConfig",
    "ModelConfig",
    "PositionsConfig",
    "RunConfig",
    "SAEConfig",
    "StoreConfig",
    "TaskConfig",
    "TrackerConfig",
    "parse_coefficients",
    "parse_layers",
    "parse_width",
    "register_schema",
    "to_run_config",
]
