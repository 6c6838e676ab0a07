"""The `tracking` section of a config."""

from typing import Annotated

from pydantic import Field

from distseg.section import Section


class TrackingConfig(Section):
    mlflow: bool = True
    """Also log to MLflow; the run folder has everything but the images slider either way."""
    uri: str | None = None
    """default: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db in the working folder."""
    experiment: str = "distseg"
    """The MLflow experiment that the run is in."""
    system_metrics: bool = True
    """Log the machine's load and memory."""
    patience: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds that the end of a run waits, in all, for what the store has not taken yet; training never waits."""
    log_model: bool = False
    """Also log the network of the last step, as an exported graph with signature and input example."""
    parent_run: str | None = None
    """MLflow id of the run that this one is nested under."""
    tags: dict[str, str] = Field(default_factory=dict)
    """Further tags, over those that follow from the config."""
