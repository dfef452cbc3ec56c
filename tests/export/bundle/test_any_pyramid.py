"""A model of any shape is built and agrees with its reference, or is refused with a rule."""

from hypothesis import HealthCheck, Phase, given, seed, settings
from support.pyramids import AnyModel, any_model, outcome


@seed(0)
@settings(
    max_examples=15,
    deadline=None,
    database=None,
    phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)
@given(any_model())
def test_any_pyramid(model: AnyModel) -> None:
    """Fifteen; `scripts/check_pyramids.py` draws as many as one likes."""
    outcome(model)
