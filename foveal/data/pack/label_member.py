"""Labels that are stored beside their images as members of their own, such as masks and boxes."""

from abc import ABC, abstractmethod

from foveal.data.image.targets import LabelReader, LabelSurvey

ImageSize = tuple[int, int]  # (width, height) in pixels of the upright image


class LabelMember(ABC):
    """Member of every sample that holds its label. ``reader`` reads it as training does, and refuses what is wrong."""

    reader: LabelReader

    @property
    def field(self) -> str:
        """Return the member's name behind the key."""
        return self.reader.field

    @abstractmethod
    def resize(self, data: bytes, before: ImageSize, after: ImageSize) -> bytes:
        """Return the label of an image that was resized."""

    def explain(self, sentence: str) -> str:
        """Return a sentence of the reader, or of a survey of its labels, with the options of the command."""
        return sentence

    def notes(self) -> list[str]:
        """Return what was changed in the labels while they were read, in sentences."""
        return []


def describe_survey(split: str, survey: LabelSurvey, *, severities: tuple[str, ...]) -> list[str]:
    """Return what the labels of a split show, of these severities, as sentences."""
    findings = survey.content_findings(is_complete=True) if survey.num_labels else []
    return [f"split '{split}': {found.sentence}" for found in findings if found.severity in severities]
