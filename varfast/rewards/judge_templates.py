"""Questions for judges whose answers have a form of their own, and how those are read.

The form of the answer is the judge's; the words of the question are ours. A judge may rate otherwise when it is asked
in the words that it was trained with, which its repository has: `question` takes them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class JudgeTemplate:
    """A question, and where the numbers are in the answer.

    Attributes:
        question: with {prompt}.
        range: least and greatest number.
        patterns: regular expressions with one group each; the score is the mean of what they find.
    """

    question: str
    range: tuple[float, float]
    patterns: tuple[str, ...]


_NUMBER = r"([0-9]+(?:\.[0-9]+)?)"

# github.com/CodeGoat24/UnifiedReward: the form of the answers of its pointwise judge, of version 1 and 2.
TEMPLATES = {
    "unified_reward": JudgeTemplate(
        "A model drew this image for a caption. Rate it by two things: whether it shows what the caption names, with "
        "the attributes and relations that it says, and how good a picture it is: sharpness, details, colours, looks.\n"
        "First list the elements of the caption, each as 'element (type): 1' if the image shows it, and as 'element "
        "(type): 0' if it does not. Then write one number from 1 to 5 after 'Final Score:'.\n"
        "Caption: [{prompt}]",
        (1.0, 5.0),
        (rf"Final Score:\s*{_NUMBER}",),
    ),
    "unified_reward_2": JudgeTemplate(
        "A model drew this image for a caption. Rate it from 1 to 5 on three axes: alignment, whether it shows what "
        "the caption says; coherence, whether it is free of broken shapes and of what cannot be; style, whether it "
        "looks good, whatever the caption says. Answer in this form:\n\n"
        "Alignment Score (1-5): X\n"
        "Coherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n\n"
        "Caption: [{prompt}]",
        (1.0, 5.0),
        tuple(rf"{axis} Score \(1-5\):\s*{_NUMBER}" for axis in ("Alignment", "Coherence", "Style")),
    ),
}
