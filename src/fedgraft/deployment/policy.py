"""What a site lets a coordinator ask, and what it lets leave: comparisons of the policy with the question and the encoded reply.

Each check raises `Refusal`, whose text names the key of `site.yaml` that refused and says what was asked for, nothing of the site's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fedgraft.bundle import Outline
from fedgraft.deployment.site_settings import PolicySettings
from fedgraft.methods.method import Method
from fedgraft.transforms.secure_aggregation.settings import DUE, MASKED, TRAIN
from fedgraft.tree import Predicate
from fedgraft.words import size

PERSONAL = "method"
"""The key of refusals that no setting lifts."""


class Refusal(ValueError):
    """The site does not do this; `key` is the setting that says so."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"{key}: {reason}")
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What a site has given so far."""

    total_bytes: int = 0
    """Bytes of all replies of all runs."""
    rounds: frozenset[str] = frozenset()
    """Fingerprints of the training questions of this run that were answered; a question that is asked again counts once."""


def check_run(policy: PolicySettings, name: str, method: Method, rounds: int) -> None:
    """Whether a run may be taken part in at all: its method by name, the method itself, and the rounds that it plans.

    Raises:
        Refusal: method, rounds or privacy are not as the policy wants them.
    """
    if policy.methods is not None and name not in policy.methods:
        raise Refusal("policy.methods", f"this site does not take part in {name!r}, only in: {', '.join(policy.methods) or 'nothing'}")
    if method.pooled:
        raise Refusal(PERSONAL, f"{name!r} pools the clients' rows, and rows never leave this site; choose another method")
    if policy.rounds is not None and rounds > policy.rounds:
        raise Refusal("policy.rounds", f"the run plans {rounds} rounds, this site gives at most {policy.rounds}; lower federation.rounds")
    for key, wanted in (("clip", policy.privacy.clip), ("noise", policy.privacy.noise)):
        if wanted is not None:
            raise Refusal(f"policy.privacy.{key}", f"this site demands {key} {wanted:g}, and this fedgraft has no differential privacy")


def check_tasks(lm_eval: Sequence[str]) -> None:
    """A coordinator has no code run here: a task of lm-eval can name Python beside its file, or in a dataset.

    Raises:
        Refusal: the recipe asks for such tasks.
    """
    if lm_eval:
        raise Refusal(
            "evaluation.lm_eval", f"tasks of lm-eval ({lm_eval[0]!r}, ...) can run code, so no site asks them; use evaluation.tasks"
        )


def check_masks(policy: PolicySettings, masked: bool) -> None:
    """Whether replies of a run are masked, where they have to be.

    Raises:
        Refusal: they aren't.
    """
    if policy.secure_aggregation == "required" and not masked:
        raise Refusal("policy.secure_aggregation", "this site sends masked leaves alone; set secure_aggregation.name to secagg_plus")


def check_site(policy: PolicySettings, base: str, examples: int) -> None:
    """Whether what the site would train with is what the policy expects: its base model's digest and the rows behind a reply.

    Raises:
        Refusal: another base model, or too few rows; the number itself is not told.
    """
    if policy.bases is not None and base not in policy.bases:
        raise Refusal("policy.bases", f"the base model here has the digest {base}, which this site does not train on")
    if examples < policy.min_examples:
        raise Refusal("policy.min_examples", f"fewer than {policy.min_examples} rows would stand behind the reply")


def check_question(policy: PolicySettings, question: str, fingerprint: str, spent: Spent) -> None:
    """Whether a question is answered.

    Raises:
        Refusal: such questions are not, or the rounds are used up.
    """
    if (TRAIN if question in DUE else question) not in policy.questions:
        raise Refusal("policy.questions", f"this site does not answer {question!r}, only: {', '.join(policy.questions) or 'nothing'}")
    if policy.rounds is not None and question == "train" and len(spent.rounds | {fingerprint}) > policy.rounds:
        raise Refusal("policy.rounds", f"{policy.rounds} training rounds of this run have been answered, and no more will be")


def check_reply(policy: PolicySettings, content: Outline, personal: Predicate) -> None:
    """Whether an encoded reply may leave: the name of every tree and fact, the address of every leaf.

    Raises:
        Refusal: it holds something that stays here.
    """
    for tree, leaves in sorted(content.trees.items()):
        if leaves and tree != MASKED and policy.secure_aggregation == "required":
            raise Refusal("policy.secure_aggregation", f"the reply holds leaves under {tree!r}, this site sends masked ones alone")
        if leaves and tree not in policy.trees:
            raise Refusal("policy.trees", f"the reply holds leaves under {tree!r}, this site sends only: {', '.join(policy.trees)}")
        for address in sorted(leaves):
            if personal(address):
                raise Refusal(PERSONAL, f"leaf {address!r} is the client's own in this method and never leaves")
            if not any(covers(pattern, address) for pattern in policy.leaves):
                raise Refusal("policy.leaves", f"leaf {address!r} stays here; those that may leave: {', '.join(policy.leaves) or 'none'}")
    for name in sorted(content.facts.keys() - set(policy.facts)):
        raise Refusal("policy.facts", f"the reply tells {name!r}, this site tells only: {', '.join(policy.facts) or 'nothing'}")


def check_bytes(policy: PolicySettings, length: int, spent: Spent) -> None:
    """Whether so many bytes may leave.

    Raises:
        Refusal: too many for one reply, or for all together.
    """
    if policy.reply_bytes is not None and length > policy.reply_bytes:
        raise Refusal("policy.reply_bytes", f"the reply has {size(length)}, at most {size(policy.reply_bytes)} leave at once")
    if policy.total_bytes is not None and spent.total_bytes + length > policy.total_bytes:
        raise Refusal("policy.total_bytes", f"the reply would exceed the {size(policy.total_bytes)} that leave this site in all")


def covers(pattern: str, address: str) -> bool:
    """Whether a pattern is a head of an address, part by part; `*` and `?` stay within a part."""
    wanted, parts = pattern.split("."), address.split(".")
    return len(wanted) <= len(parts) and all(map(fnmatchcase, parts, wanted))
