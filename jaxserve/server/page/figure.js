// Numbers as people read them.

/** A rate: one digit after the point while it is small. */
export const figure = (value) => value.toFixed(value > 0 && value < 10 ? 1 : 0);

/** A time given in seconds. */
export function duration(seconds) {
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  if (seconds < 1) return `${(seconds * 1000).toFixed(0)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

/** Facts in a line, which breaks between them only. */
export const line = (facts) => facts.map((fact) => fact.replaceAll(" ", "\u00a0")).join(" · ");

/** A count with its noun. */
export const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;
