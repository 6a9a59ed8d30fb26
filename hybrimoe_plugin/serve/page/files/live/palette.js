// The map's colours: each place, and on the way to the colour of use.

import { themed } from "../dom.js";

export const PLACES = ["cpu", "accelerator", "in_flight", "flash"];
export const NAMES = {
  accelerator: "accelerator",
  in_flight: "in flight",
  cpu: "CPU",
  flash: "flash",
};
const THEME = ["--place-cpu", "--place-accelerator", "--place-flight", "--place-flash"];
export const HEATS = 5; // from at rest to just used

/** [place * HEATS + heat] colours of the theme as it is now. */
export function palette() {
  const spark = channels(themed("--spark"));
  return THEME.flatMap((name) => {
    const rest = channels(themed(name));
    return Array.from({ length: HEATS }, (_, heat) => mixed(rest, spark, heat / (HEATS - 1)));
  });
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function mixed(from, to, share) {
  const part = from.map((value, at) => Math.round(value + (to[at] - value) * share * 0.85));
  return `rgb(${part.join(" ")})`;
}
