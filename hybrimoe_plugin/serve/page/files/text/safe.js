// Text and links of a model, made harmless.

const CONTROLS = /[\u202a-\u202e\u2066-\u2069]/;

/** Text nodes; characters that would reorder the text around them are named instead. */
export function safeText(text) {
  if (!CONTROLS.test(text)) return [document.createTextNode(text)];
  return text.split(/([\u202a-\u202e\u2066-\u2069])/).filter(Boolean).map((part) => {
    if (!CONTROLS.test(part)) return document.createTextNode(part);
    const shown = document.createElement("span");
    shown.className = "control";
    shown.title = "a character that reorders text";
    shown.textContent = `U+${part.charCodeAt(0).toString(16).toUpperCase()}`;
    return shown;
  });
}

/** A link element for an http or https address; null for any other. */
export function safeLink(address) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (url.protocol !== "http:" && url.protocol !== "https:") return null;
  const link = document.createElement("a");
  link.href = url.href;
  link.title = url.href;
  link.rel = "noopener noreferrer";
  link.target = "_blank";
  return link;
}
