"""Text from a model: generation with a constant state, and conversations.

generation   tokens in, tokens out: prefill in pieces, then one compiled step a token
chat         text in, text out: templates, streams, conversations that read each turn once
"""

__all__ = ["chat", "generation"]
