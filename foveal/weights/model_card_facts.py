"""What a run knows of its exports beside their cards, for their model cards."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataFacts:
    """A part of a data set by its name, split and number of images; ``num_used``: images of it in an epoch or an evaluation."""

    name: str
    split: str
    num_images: int
    num_used: int | None = None


@dataclass(frozen=True, slots=True)
class ModelCardFacts:
    """What README.md of an export says and ``card.json`` does not hold.

    The texts are the settings ``card``, under the names of Hugging Face's ``ModelCardData`` and of its template.
    ``student``: its name, if it is one of several students.
    """

    training_data: tuple[DataFacts, ...] = ()
    evaluation_data: DataFacts | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    developers: str | None = None
    model_description: str | None = None
    student: str | None = None


NO_FACTS = ModelCardFacts()
