// Starts the page.

import { chat } from "./chat.js";
import { startComposer, setContext } from "./composer.js";
import { askForKey } from "./dialogs.js";
import { byId, setIcon } from "./dom.js";
import { language, onLanguage, setLanguage, t, translate } from "./i18n.js";
import { hold, notify, release } from "./notice.js";
import { startPlacement } from "./placement.js";
import { isDark, setTheme } from "./preferences.js";
import { model, onKeyNeeded } from "./server.js";
import { openSettings } from "./settings.js";
import { startShortcuts } from "./shortcuts.js";
import { startSidebar } from "./sidebar.js";
import { setServedName, startTranscript } from "./transcript.js";
import { onView, startViews } from "./views.js";

const RETRY = 2000; // milliseconds

async function start() {
  translate(document);
  onKeyNeeded(askForKey);
  startButtons();
  startSidebar();
  startTranscript();
  startComposer();
  startShortcuts();
  startPlacement();
  onView((name) => name === "chat" && byId("draft").focus());
  startViews();
  try {
    await chat.load();
  } catch (error) {
    notify(t("notKept", { why: error.message }));
  }
  await findModel();
}

function startButtons() {
  byId("open-settings").addEventListener("click", openSettings);
  byId("switch-theme").addEventListener("click", () => {
    setTheme(isDark() ? "light" : "dark");
    showTheme();
  });
  byId("switch-language").addEventListener("click", () => setLanguage(language() === "en" ? "zh" : "en"));
  onLanguage(showTheme);
  showTheme();
}

function showTheme() {
  setIcon(byId("switch-theme"), isDark() ? "sun" : "moon");
  byId("switch-language").textContent = t("switchLanguage");
}

/** Ask for the model until the server has loaded it. */
async function findModel() {
  for (let waited = false; ; waited = true) {
    try {
      const { id, max_model_len: context } = await model();
      byId("model-name").textContent = id;
      setServedName(id);
      setContext(context);
      if (waited) release();
      document.body.dataset.ready = "true";
      return;
    } catch (error) {
      hold(error.status === 503 ? t("loading") : error.status === 0 ? t("offline") : error.message);
      if (error.status === 401 || error.status === undefined) return;
      await new Promise((resolve) => setTimeout(resolve, RETRY));
    }
  }
}

start();
