"""`allmem lm-eval`."""

from allmem_jax.cli import terminal


def lm_eval(arguments: list[str]) -> int:
    """lm_eval's command, whose arguments are its own; 2 where it is not installed."""
    try:
        from allmem_jax.evaluation import harness
    except ImportError as error:
        terminal.say(f"error: {error}")
        return 2
    return harness.main(arguments)
