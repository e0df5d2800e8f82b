// What the chat page does in the browser, where its chat lives: a list of messages as Gradio's Chatbot has them.
// A last message that is pending is a reply that is awaited (it has a log) or written. KEY is set by page.py.

const isPending = (chat) => chat.at(-1)?.metadata?.status === "pending";
const textOf = (message) => message.content.map((part) => part.text).join("").replaceAll("\u2060", "");
const lastOfUser = (chat) => chat.findLastIndex((message) => message.role === "user");
const message = (role, text, metadata) => ({role, content: [{type: "text", text}], metadata});
const AWAITED = message("assistant", "…", {status: "pending", log: "awaited"});
let restored = false, dropped = false;

// The chat and the message box after its last message was taken back; it stands before what is typed there.
function takeBack(chat, typed) {
    const value = [textOf(chat.at(-1)), typed].filter((text) => text).join("\n");
    return [chat.slice(0, -1), {__type__: "update", value, submit_btn: "Send", stop_btn: false}];
}

// What answers an event: each gives a list, a value for each output.
window.page = {
    // The box is emptied when a message is sent, and never later, while one types again.
    send(chat, typed) {
        if (isPending(chat)) return [chat, typed];
        // The Chatbot takes text for HTML; a character without width keeps a tag or an entity text.
        const text = typed.replaceAll(/(?<=<)(?=[a-zA-Z\/!?])|(?<=&)(?=#|[a-zA-Z]{2})/g, "\u2060");
        return [[...chat, message("user", text), AWAITED], ""];
    },

    again: (chat) => [[...chat.slice(0, lastOfUser(chat) + 1), AWAITED]],

    undo: (chat, typed) => takeBack(chat.slice(0, lastOfUser(chat) + 1), typed),

    // After a reply: a message that got none, because it was refused or stopped, goes back into the box.
    settle(chat, typed) {
        if (dropped) chat = [];
        dropped = false;
        if (isPending(chat)) {
            const reply = {...chat.at(-1), metadata: {}};
            chat = chat.at(-1).metadata.log ? chat.slice(0, -1) : [...chat.slice(0, -1), reply];
        }
        if (chat.at(-1)?.role === "user") return takeBack(chat, typed);
        return [chat, {__type__: "update", submit_btn: "Send", stop_btn: false}];
    },

    // A reply that is written goes on until the server has heard of it: `settle` drops that too.
    drop(chat) {
        dropped = isPending(chat);
        return [[]];
    },

    // Kept in the browser for a reload, but not a reply in the making. The buttons below the chat need a chat.
    save(chat, persona) {
        if (restored && !isPending(chat)) localStorage.setItem(KEY, JSON.stringify([chat, persona]));
        const button = {__type__: "update", interactive: chat.length > 0};
        return [button, button];
    },

    restore(chat, persona) {
        const saved = localStorage.getItem(KEY);
        restored = true;
        return chat.length || !saved ? [chat, persona] : JSON.parse(saved);
    },

    // The chat as a file of training data, made here: the server writes none.
    transcript(chat, persona) {
        const messages = chat.map((message) => ({role: message.role, content: textOf(message)}));
        const personality = persona.split("\n").map((line) => line.trim()).filter((line) => line);
        const link = document.createElement("a");
        link.href = URL.createObjectURL(new Blob([JSON.stringify({personality, messages}) + "\n"]));
        link.download = "chat.jsonl";
        link.click();
    },
};

document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") document.querySelector("#message .stop-button")?.click();
});
