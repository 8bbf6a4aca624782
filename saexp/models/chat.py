"""A message in the chat template of a model's tokenizer, which is a program in the model's files.

transformers runs it in a sandbox.
"""

from typing import Any

from saexp.errors import ModelError
from saexp.wording import brief


def in_template(tokenizer: Any, message: str, name: str) -> str:
    """The message as a user's, followed by what begins the answer.

    Raises ModelError, beginning with the model's `name`, where there is no template or it fails.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{name} has no chat template; set model.chat=false")
    messages = [{"role": "user", "content": message}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # Whatever a program can raise.
        reason = brief(f"{type(error).__name__}: {error}", 160)
        raise ModelError(
            f"{name}: its chat template fails ({reason}); set model.chat=false"
        ) from error
    if not isinstance(text, str):
        raise ModelError(f"{name}: its chat template gives no text; set model.chat=false")
    return text
