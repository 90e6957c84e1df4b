"""The structure of one group's update: its parts, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..functional import MOMENTS, Want
from ..sharding.layout import Each
from .kinds import NOT_NEGATIVE, Kind
from .length import SAMPLE, Published
from .numbers import Number, numbers_of
from .protocols import Feed, Projector, Residual, Rule, Storage
from .storage import STORAGES
from .types import COUNTED, Group


@dataclass(frozen=True)
class Plan:
    """The structure of one group's update; a pairing that makes no sense is refused here."""

    feed: Feed
    rule: Rule
    projector: Projector
    residual: Residual
    length: Published
    storage: Storage
    feed_storage: Storage
    side: str
    on_refresh: str

    @cached_property
    def slots(self) -> tuple[str, ...]:
        """The moments that are kept in the subspace."""
        return tuple(slot for slot in self.rule.slots if slot not in self.feed.slots)

    @cached_property
    def plain(self) -> Rule:
        """The rule of parameters that are not projected."""
        return self.rule.plain

    @cached_property
    def want(self) -> Want:
        """What the residual and its update need of a step."""
        return self.residual.want

    @cached_property
    def takes_turns(self) -> bool:
        """Whether matrices sit out at times, and have no moments then."""
        return self.projector.whole and not self.projector.everything

    @cached_property
    def kept(self) -> tuple[str, ...]:
        """What rule and residual keep besides: one number a matrix, or a row of its columns."""
        return (*self.rule.keys, *self.residual.keys)

    @cached_property
    def kept_by_row(self) -> tuple[str, ...]:
        """What rule and residual keep for each row."""
        return (*self.rule.row_keys, *self.residual.row_keys)

    @cached_property
    def kinds(self) -> dict[str, Kind]:
        """Which values entries of a state may have; other entries may have any finite values."""
        squares = {*self.rule.squares, *self.rule.plain.squares}
        kinds = {**COUNTED, **dict.fromkeys(squares, NOT_NEGATIVE)}
        for part in (self.projector, self.rule, self.residual, self.length):
            kinds.update(getattr(part, "kinds", {}))  # a part of a user's own may not say
        return kinds

    @cached_property
    def numbers(self) -> dict[str, Number]:
        """The numbers that parts read from the group of what is projected, by key."""
        parts = (self.feed, self.rule, self.projector, self.residual)
        return {key: number for part in parts for key, number in numbers_of(part).items()}

    @cached_property
    def optional(self) -> dict[str, bool]:
        """The numbers that may be None, which changes what is kept, and whether they are here."""
        parts = (self.feed, self.rule, self.projector, self.residual)
        return {
            key: getattr(part, number.field) is None
            for part in parts
            for key, number in numbers_of(part).items()
            if number.good(None)
        }

    @cached_property
    def plain_numbers(self) -> dict[str, Number]:
        """The numbers that are read for parameters that are not projected."""
        return dict(numbers_of(self.rule.plain))

    @property
    def full(self) -> bool:
        """Whether a rank that drops nothing still means something other than a plain step."""
        return self.rule.whole or self.feed.full

    def each(self, group: Group) -> Each:
        """Return which entries of a state are kept by row, once for a stack, and in parts."""
        cut = self.projector.bases if group["shard_basis"] else ()
        by_row = (*self.slots, *self.rule.plain.slots, *self.feed.slots, *self.kept_by_row, SAMPLE)
        return Each(by_row, self.projector.common, cut)

    def __post_init__(self) -> None:
        name, feed = type(self.projector).__name__, type(self.feed).__name__
        if self.on_refresh not in self.projector.on_refresh:
            raise ValueError(
                f"on_refresh={self.on_refresh!r} does not go with the projector {name}: "
                f"choose one of {', '.join(map(repr, self.projector.on_refresh))}"
            )
        if self.feed.on_refresh is not None and self.on_refresh not in self.feed.on_refresh:
            raise ValueError(
                f"on_refresh={self.on_refresh!r} does not go with the feed {feed}: "
                f"choose one of {', '.join(map(repr, self.feed.on_refresh))}"
            )
        rule = type(self.rule).__name__
        for slot in self.feed.needs:
            if slot not in self.rule.slots:
                raise ValueError(
                    f"the feed {feed} does not go with the rule {rule}, which has no {slot!r}: "
                    'choose "adam", or the feed "error_feedback"'
                )
        if self.rule.unprojected and not self.projector.everything:
            raise ValueError(
                f"the rule {rule} does not go with the projector {name}: its "
                'factors belong to rows and columns of the weight; choose projector="identity"'
            )
        if self.residual.want.norms and self.projector.whole:
            raise ValueError(
                f"the residual {type(self.residual).__name__} does not go with the projector "
                f"{name}: a matrix that sits out has no projected gradient to compare norms "
                "with; choose Drop or StateFree"
            )
        exact = self.storage in (STORAGES[None], STORAGES["float32"], STORAGES["float64"])
        if max(len(self.slots), len(self.rule.plain.slots)) > len(MOMENTS) and not exact:
            raise ValueError(
                f"state_dtype does not go with the rule {rule}: there are random bits to round "
                f"{len(MOMENTS)} moments with, and it has {len(self.slots)}; leave state_dtype out"
            )
        if self.feed.slots and self.takes_turns:
            raise ValueError(
                f"the feed {feed} does not go with the projector {name}: what a matrix that sits "
                "out would carry has no end; choose another projector"
            )
