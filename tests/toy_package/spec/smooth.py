"""A toy connector step, for the test that a new block is three files of one name."""

from dataclasses import dataclass

from vlmdeploy.spec.connector import ConnectorStep, StepMatrix


@dataclass(frozen=True)
class Smooth(ConnectorStep):
    """x + linear(mean of the row and the next one), with a bias; the last row is its own neighbour."""

    width: int
    name: str = "smooth"

    def matrices(self) -> tuple[StepMatrix, ...]:
        """The one."""
        return (StepMatrix("linear", self.width, self.width, "neighbours"),)

    def small_values(self) -> int:
        """The bias."""
        return self.width
