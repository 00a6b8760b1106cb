"""`mezzo generate`: continue a text with a trained model."""

from __future__ import annotations

import click


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.option("--prompt", default="", help="The text to continue; empty begins a document.")
@click.option("--tokens", default=200, show_default=True, help="How many tokens at most.")
@click.option("--temperature", default=0.8, show_default=True, help="0 always takes the likeliest token.")
@click.option("--top-k", type=int, help="Draw from the K likeliest tokens only.")
@click.option("--top-p", type=float, help="Draw from the likeliest tokens that together have this probability.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same text.")
@click.option("--policy", metavar="POLICY", help="Run under another policy than the run's own.")
def generate(
    run: str, prompt: str, tokens: int, temperature: float, top_k: int | None, top_p: float | None, seed: int,
    policy: str | None,
) -> None:  # fmt: skip
    """Continue a text with the newest checkpoint of RUN; prints as it goes.

    \b
    Examples:
      mezzo generate runs/first --prompt "def main("
      mezzo generate runs/first --temperature 0 --tokens 50
    """
    from mezzo.models.sampling import generate as draw
    from mezzo.train.stored import load_run

    model, tokenizer, _, _ = load_run(run, policy)
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.eot]
    stream = draw(
        model, ids, max_new_tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        eot=tokenizer.eot, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    decoder = tokenizer.stream()
    click.echo(prompt, nl=False)
    for token in stream:
        click.echo(decoder.push(token), nl=False)
    click.echo(decoder.flush())
