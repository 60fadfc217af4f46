"""Questions that judges were trained with, and how their answers are read.

The words are their authors': another wording would be another judge.
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

# github.com/CodeGoat24/UnifiedReward (MIT): of version 1, inference_qwen/image_generation/
# qwen_point_score_image_generation.py; of version 2, inference_qwen/UnifiedReward-2.0-inference/
# point_score_ACS_image_generation.py.
TEMPLATES = {
    "unified_reward": JudgeTemplate(
        "You are given a text caption and a generated image based on that caption. Your task is to evaluate this image "
        "based on two key criteria:\n"
        "1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the "
        "accuracy of depicted objects, their relationships, and attributes as described in the caption.\n"
        "2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, "
        "color accuracy, and overall aesthetic appeal.\n"
        "Extract key elements from the provided text caption, evaluate their presence in the generated image using the "
        "format: 'element (type): value' (where value=0 means not generated, and value=1 means generated), and assign "
        "a score from 1 to 5 after 'Final Score:'.\n"
        "Your task is provided as follows:\n"
        "Text Caption: [{prompt}]",
        (1.0, 5.0),
        (rf"Final Score:\s*{_NUMBER}",),
    ),
    "unified_reward_2": JudgeTemplate(
        "You are presented with a generated image and its associated text caption. Your task is to analyze the image "
        "across multiple dimensions in relation to the caption. Specifically:\n"
        "Provide overall assessments for the image along the following axes (each rated from 1 to 5):\n"
        "- Alignment Score: How well the image matches the caption in terms of content.\n"
        "- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, "
        "etc.).\n"
        "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.\n\n"
        "Output your evaluation using the format below:\n\n"
        "Alignment Score (1-5): X\n"
        "Coherence Score (1-5): Y\n"
        "Style Score (1-5): Z\n\n"
        "Your task is provided as follows:\n"
        "Text Caption: [{prompt}]",
        (1.0, 5.0),
        tuple(rf"{axis} Score \(1-5\):\s*{_NUMBER}" for axis in ("Alignment", "Coherence", "Style")),
    ),
}
