// Conversations in the browser's IndexedDB, and news of changes for other tabs.

const STORE = "conversations";
const PATH = new URL("./", location.href).pathname;
const channel = new BroadcastChannel(`dots1:${PATH}`);
let opening;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(`dots1:${PATH}`, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

/** Do something with the object store; resolve when it is written. */
async function transact(mode, act) {
  const transaction = (await open()).transaction(STORE, mode);
  const request = act(transaction.objectStore(STORE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** Return all conversations, the latest first. */
export async function allConversations() {
  const found = await transact("readonly", (store) => store.getAll());
  return found.sort((a, b) => b.updated - a.updated);
}

/** Return a conversation, or undefined if it was deleted. */
export const readConversation = (id) => transact("readonly", (store) => store.get(id));

export async function saveConversation(conversation) {
  await transact("readwrite", (store) => store.put(conversation));
  channel.postMessage(conversation.id);
}

export async function deleteConversation(id) {
  await transact("readwrite", (store) => store.delete(id));
  channel.postMessage(id);
}

/** Call `changed(id)` when another tab has changed a conversation. */
export const onOtherTab = (changed) => channel.addEventListener("message", (event) => changed(event.data));
