// The map's colours: each place has one at rest and one in use, and steps between them.

import { themed } from "../dom.js";

export const PLACES = ["cpu", "accelerator", "in_flight", "flash"];
export const NAMES = {
  accelerator: "accelerator",
  in_flight: "in flight",
  cpu: "CPU",
  flash: "flash",
};
export const HEATS = 5; // from at rest to just used

/** [place * HEATS + heat] colours of the theme as it is now. */
export function palette() {
  return PLACES.flatMap((name) => {
    const [rest, used] = [`--${name}`, `--${name}-used`].map((found) => channels(themed(found)));
    return Array.from({ length: HEATS }, (_, heat) => mixed(rest, used, heat / (HEATS - 1)));
  });
}

function channels(colour) {
  return [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
}

function mixed(from, to, share) {
  const part = from.map((value, at) => Math.round(value + (to[at] - value) * share));
  return `rgb(${part.join(" ")})`;
}
