// Puts the page together.

import { Chat } from "./chat/chat.js";
import { Settings } from "./chat/settings.js";
import { byId } from "./dom.js";
import { Panel } from "./live/panel.js";
import { modelName } from "./net/api.js";

const settings = new Settings(() => {
  greet();
  panel.feed.retry();
});
const chat = new Chat(settings);
const panel = new Panel(greeted);

function greeted(name) {
  chat.name = name;
  byId("model").textContent = name;
  document.title = name;
}

async function greet() {
  try {
    greeted(await modelName());
  } catch (error) {
    if (error.status === 401) settings.open("The server asks for its API key.");
  }
}

window.addEventListener("pagehide", () => chat.conversation.save());
greet();
