// Base64 of the feed as numbers.

/** Bytes of a text in base64. */
export function bytes(text) {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** `count` numbers of so many bits each, the first in the lowest bits of the first byte. */
export function unpacked(text, bits, count) {
  const packed = bytes(text);
  const mask = (1 << bits) - 1;
  const found = new Uint8Array(count);
  for (let at = 0; at < count; at += 1) {
    const bit = at * bits;
    found[at] = (packed[bit >> 3] >> (bit & 7)) & mask;
  }
  return found;
}
