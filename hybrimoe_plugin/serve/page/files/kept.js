// What is kept in this tab alone, and gone with it.

/** The value kept under a name, or another one. */
export function kept(name, otherwise) {
  try {
    const text = sessionStorage.getItem(name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
}

/** Keep a value; a tab that may keep nothing, or no more, goes on without. */
export function keep(name, value) {
  try {
    sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Private windows, or a conversation larger than a tab may keep.
  }
}
