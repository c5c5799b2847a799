// What the browser remembers about the page itself: theme, language, settings of new conversations.

const NAME = "dots1:preferences";
let known;

/** Return all preferences; without storage they last as long as the page. */
export function preferences() {
  if (!known) {
    try {
      known = JSON.parse(localStorage.getItem(NAME)) ?? {};
    } catch {
      known = {};
    }
  }
  return known;
}

export function setPreference(name, value) {
  known = { ...preferences(), [name]: value };
  try {
    localStorage.setItem(NAME, JSON.stringify(known));
  } catch {
    // The preference lasts as long as the page.
  }
}

/** Use a theme: "light", "dark", or "auto" for the system's. */
export function setTheme(theme) {
  setPreference("theme", theme);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

export const isDark = () => {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
