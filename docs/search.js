// A search for `--keep` means the word: for lunr, which searches, leading dashes would exclude it.
const field = document.querySelector("[data-md-component=search-query]");
const { get, set } = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
Object.defineProperty(field, "value", {
  get: () => get.call(field).replace(/(^|\s)-+/g, "$1"),
  set: (text) => set.call(field, text),
});
